"""`python -m lit_binq.demo`."""

import sys

from lit_binq.demo.fetch import main

sys.exit(main())
