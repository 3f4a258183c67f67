"""Where a block stands: its layer number, and the stack that it belongs to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A layer of a stack. The decoder's names have no prefix, with and without an encoder."""

    index: int
    """Layer number within the stack."""
    prefix: str = ""
    """What comes before "layers" in the names of its parameters."""

    @property
    def name(self) -> str:
        """Prefix of the names of the block's parameters."""
        return f"{self.prefix}layers.{self.index}"

    @property
    def site(self) -> tuple[int | str, ...]:
        """What distinguishes the block's dropout masks from those of other blocks."""
        return (self.prefix, self.index) if self.prefix else (self.index,)
