"""The fused operations. Each file is one operation: public function, definition, schemas, gradients."""

from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv_bn_act import conv_bn_act
from fastgan.ops.conv_transpose_bn_act import conv_transpose_bn_act
from fastgan.ops.gan_bce import gan_bce, gan_bce_generator

__all__ = ["bn_act", "conv_bn_act", "conv_transpose_bn_act", "gan_bce", "gan_bce_generator"]
