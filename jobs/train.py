"""Train on a Ray cluster: `ray job submit --working-dir . -- python jobs/train.py s3://data/ --output s3://runs/1`.

Takes the arguments of `lfm-scan train`. The last line of the job's log is one of JSON, for programs.
"""

import sys
from pathlib import Path

# The job's working directory holds the package; on the cluster it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lfm_scan.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", "--json-summary", *sys.argv[1:]]))
