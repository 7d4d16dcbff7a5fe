"""The one exception that a command shows as a single line."""


class UserError(Exception):
    """Something the user can put right; the message says what was found and what to do."""
