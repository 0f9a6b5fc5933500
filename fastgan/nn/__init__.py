"""Networks: the DCGAN generator and discriminator for images of 16 to 512 pixels."""

from fastgan.nn.blocks import Blocks
from fastgan.nn.models import Discriminator, Generator, dcgan_init_
from fastgan.nn.stack import ConvStack

__all__ = ["Blocks", "ConvStack", "Discriminator", "Generator", "dcgan_init_"]
