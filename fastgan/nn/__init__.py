"""Networks: the DCGAN generator and discriminator for images of 16 to 512 pixels, and `fuse` for those of your own."""

from fastgan.nn.fusion import fuse
from fastgan.nn.models import Discriminator, Generator, dcgan_init_
from fastgan.nn.stack import ConvStack

__all__ = ["ConvStack", "Discriminator", "Generator", "dcgan_init_", "fuse"]
