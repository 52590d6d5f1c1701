"""`python -m adapterd` is `adapterd`."""

import sys

from adapterd.cli import main

sys.exit(main())
