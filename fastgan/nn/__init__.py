"""Networks: the DCGAN generator and discriminator for images of 16 to 512 pixels."""

from fastgan.nn.models import Discriminator, Generator, dcgan_init_

__all__ = ["Discriminator", "Generator", "dcgan_init_"]
