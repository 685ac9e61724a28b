"""`python -m fed_diffusion`, as `fed-diffusion`."""

import sys

from fed_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
