"""The fused operations. Each file is one operation: public function, definition, schemas, gradients."""

from fastgan.ops.bn_act import bn_act

__all__ = ["bn_act"]
