"""`python -m fed_diffusion` does what the command `fed-diffusion` does."""

import sys

from fed_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
