"""Run `hf-gradiend` with the arguments of the command line, alone or under torchrun."""

import sys

from hf_gradiend.cli import main

sys.exit(main())
