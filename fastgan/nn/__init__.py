"""Networks: the DCGAN generator and discriminator for images of 16 to 512 pixels."""

from fastgan.nn.models import Discriminator, Generator, dcgan_init_
from fastgan.nn.stack import ConvStack

__all__ = ["ConvStack", "Discriminator", "Generator", "dcgan_init_"]
