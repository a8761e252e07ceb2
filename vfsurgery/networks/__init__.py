"""Networks: model names as in ``timm:resnet18``, and those of the examples and of the paper."""
