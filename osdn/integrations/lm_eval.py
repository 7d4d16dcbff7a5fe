"""The lm-evaluation-harness's own command line, with our model class registered.

python -m osdn.integrations.lm_eval run --model hf --model_args pretrained=DIR --tasks NAME
"""

import sys

import osdn.model.modeling  # noqa: F401  registers the model class


def main() -> int:
    """Hand over to the harness, or say how to install it."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print("needs the lm-evaluation-harness: pip install 'osdn[eval]'", file=sys.stderr)
        return 1
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
