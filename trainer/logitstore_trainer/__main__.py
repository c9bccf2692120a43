"""`python -m logitstore_trainer` is the `logitstore` command."""

import sys

from logitstore_trainer.cli import main

sys.exit(main())
