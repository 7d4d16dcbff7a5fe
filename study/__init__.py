"""The study: the same experiments on every mixer, in pieces that any GPU machine can take."""
