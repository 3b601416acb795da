"""The Python API on a laptop, without GPU, cluster or server: `python examples/nas_api.py [DATASET]`.

Small everywhere, to see how it goes; for a network to use, train the supernet longer and fine-tune what was found.
"""

import sys

from yolov8_nas import NAS

nas = NAS("tiny", device="cpu", workdir="runs/nas")
nas.train(data=sys.argv[1] if len(sys.argv) > 1 else None, epochs=8, imgsz=128, batch=8, random_networks=1)
print(nas)

best = nas.search(
    metric="mAP",
    constraint_type="latency",
    constraint_value="80%stock",
    hardware="cpu",
    generations=4,
    population=12,
    bn_images=64,
    probe={"networks": 48, "holdout": 12, "max_mape": 0.15},
)
print(best)

best.finetune(epochs=8, lr=0.002)
print(best.val())
print(best.save("runs/nas/best.pt"))
print(best.export(format="onnx"))
