"""Losses between the logits of a student and of its teachers.

Pure functions on arrays in the manner of ``optax.losses``: the class axis is reduced, all other
axes stay, and the caller takes the mean. They hold to four rules.

* **Dtype.** Everything is computed, and returned, in float32, or in float64 if one of the logit
  arrays is. optax returns the dtype of the logits; a loss in bfloat16 has three digits, and a mean
  over a batch of such losses stands still long before the student does. Gradients come back in
  the dtype of the argument they belong to.
* **Classes that do not count.** A class whose ``where`` is false is not read in any argument: NaN
  and infinity there reach neither the loss nor a gradient. The rest is renormalised. A logit of
  ``-inf`` is a class of probability zero, with ``0 log 0 = 0``; its own gradient is zero. A row in
  which the teacher has no class left is padding: its divergence is 0.
* **Infinity.** A student that gives probability zero to what the teacher (or the label) deems
  possible has an infinite loss. Its gradients stay finite: the student's is the limit
  ``softmax(student) - softmax(teacher)``, the teacher's is 0, as no finite change helps.
  A ``+inf`` or NaN logit in a class that counts makes the loss of its example NaN, and of no
  other: an overflow is shown, not hidden.
* **Checks.** Shapes and dtypes are always checked. Values (temperature, weight, labels) are checked
  when they are known; inside ``jit`` a temperature that is not positive, or a label that is no
  class, makes the loss NaN.
"""
