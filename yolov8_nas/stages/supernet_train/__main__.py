"""One of torchrun's processes; see `run`."""

import sys

from yolov8_nas.stages.supernet_train.run import main

sys.exit(main())
