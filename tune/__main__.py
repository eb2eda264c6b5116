import sys

from tune.search import main

sys.exit(main())
