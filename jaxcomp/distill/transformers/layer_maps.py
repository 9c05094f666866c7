"""Which layer of the teacher each layer of the student learns from."""


def layer_map(student_depth: int, teacher_depth: int, kind: str = "uniform") -> tuple[int, ...]:
    """Index of the teacher's layer that each layer of the student learns from.

    Layers count from 0 and do not include the embedding; where a model returns its embedding as
    the first of its hidden states, add 1 to both indices and pair 0 with 0. Sun et al. leave the
    final layer to the loss on logits: their *PKD-skip* is ``layer_map(6, 12)[:-1]`` and their
    *PKD-last* ``layer_map(5, 11, "last")``, both for the first five layers of a student of six.

    Args:
        student_depth: number of layers of the student, at least 1.
        teacher_depth: number of layers of the teacher, at least as many.
        kind: ``"uniform"``, the last layer of each of ``student_depth`` equal groups (TinyBERT);
            ``"spread"``, even steps from the first layer to the last, rounded (the layers that
            DistilBERT starts from); ``"first"`` or ``"last"``, so many layers in a row.

    Returns:
        ``student_depth`` indices, rising.

    Raises:
        ValueError: a depth below 1, a student deeper than its teacher, a depth that ``"uniform"``
            cannot divide, an unknown kind.

    Example:
        >>> layer_map(4, 12)
        (2, 5, 8, 11)
        >>> layer_map(6, 12, "spread")
        (0, 2, 4, 7, 9, 11)
        >>> layer_map(2, 12, "last")
        (10, 11)

        Of layers stacked in one array, as a scan returns them:

        >>> import jax.numpy as jnp
        >>> from jaxcomp.distill.transformers.hidden_states import hidden_state_loss
        >>> student, teacher = jnp.ones((2, 8, 5, 3)), jnp.zeros((6, 8, 5, 3))
        >>> hidden_state_loss(student, teacher[jnp.array(layer_map(2, 6))]).shape
        (2, 8, 5)

    Jiao et al., "TinyBERT", 2020, section 3.1 (uniform); Sun et al., "Patient Knowledge
    Distillation for BERT Model Compression", 2019, section 3.2 (skip, last).
    """
    if student_depth < 1:
        raise ValueError(f"student_depth {student_depth} must be at least 1.")
    if teacher_depth < student_depth:
        message = f"student_depth {student_depth} is above teacher_depth {teacher_depth}"
        raise ValueError(f"{message}: write the pairs out, with teacher layers used repeatedly.")
    if kind == "uniform":
        if teacher_depth % student_depth:
            message = f"student_depth {student_depth} does not divide teacher_depth {teacher_depth}"
            raise ValueError(f'{message}: use kind="spread", or write the tuple out.')
        group = teacher_depth // student_depth
        return tuple(range(group - 1, teacher_depth, group))
    if kind == "spread":
        return _spread(student_depth, teacher_depth)
    if kind == "first":
        return tuple(range(student_depth))
    if kind == "last":
        return tuple(range(teacher_depth - student_depth, teacher_depth))
    raise ValueError(f'kind {kind!r} must be "uniform", "spread", "first" or "last".')


def _spread(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Both ends and, rounded half up, even steps between; of one layer, the end."""
    if student_depth == 1:
        return (teacher_depth - 1,)
    steps, last = student_depth - 1, teacher_depth - 1
    return tuple((2 * i * last + steps) // (2 * steps) for i in range(student_depth))
