import sys

from flashcp.experiments.campaign.command import main

if __name__ == "__main__":  # a part's process imports this file too
    sys.exit(main())
