import sys

from pixart.command import main

sys.exit(main())
