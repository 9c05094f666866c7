"""How the range of a format is found: which values are kept, and which are clipped for it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The range holds every value: nothing is clipped, and the largest decides the step.

    The default, and what training uses: it costs one reduction (Jacob et al., 2018, section 3).
    """


Range = AbsMax
