"""`python -m scarlet_jax COMMAND ...`: the same as `scarlet COMMAND ...`."""

import sys

from scarlet_jax.tools.cli import main

sys.exit(main())
