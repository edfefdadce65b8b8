"""`python -m mla_fp4_jax`, the same as the command `mla-fp4`."""

import sys

from mla_fp4_jax.cli import main

sys.exit(main())
