"""The operators that torchvision's Python code asks for when it is imported, and that its extension would define.

The extension fits one build of torch only, and no loader of weights calls it.
"""

import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
