"""An LSTM layer that reads a whole sequence in one operation, to train with. Imports TensorFlow."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="pipeline")  # Bidirectional makes copies of it
class FusedLSTM(keras.layers.LSTM):  # type: ignore[misc]
    """Keras's LSTM, with its weights and its answers, from TensorFlow's ``BlockLSTM``.

    Keras has a loop of small operations over the time steps, the graph of which takes twice as long
    to build, and a tenth longer to run. It is not saved: who loads a model needs Keras alone.
    The sequences (n, steps, width) begin with a state of 0, and none is masked. It computes in
    float32, whatever the policy: the operation knows no bfloat16, and an LSTM gains nothing by it.
    """

    def __init__(self, units: int, dtype: Any = "float32", **options: Any) -> None:
        super().__init__(units, dtype=dtype, **options)

    def call(
        self,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool = False,
    ) -> Any:
        """What is read after each step, (n, steps, units); without ``return_sequences`` the last.

        Raises:
            ValueError: there is an ``initial_state`` or a ``mask``.
        """
        if initial_state is not None or mask is not None:
            raise ValueError("a fused LSTM takes sequences without a mask or an initial state")
        steps = tf.transpose(tf.convert_to_tensor(sequences), (1, 0, 2))
        if self.go_backwards:
            steps = tf.reverse(steps, [0])
        weights = tf.concat([self.cell.kernel, self.cell.recurrent_kernel], axis=0)
        nothing = tf.zeros((tf.shape(steps)[1], self.units), steps.dtype)
        no_peephole = tf.zeros((self.units,), steps.dtype)
        # BlockLSTMV2 has Keras's order of the gates, but TensorFlow gives it the other one's
        # gradient.
        read = tf.raw_ops.BlockLSTM(
            seq_len_max=tf.shape(steps, tf.int64)[0],
            x=steps,
            cs_prev=nothing,
            h_prev=nothing,
            w=_cell_before_forget(weights),
            wci=no_peephole,
            wcf=no_peephole,
            wco=no_peephole,
            b=_cell_before_forget(tf.convert_to_tensor(self.cell.bias)),
            forget_bias=0.0,  # Keras's is in the bias
            cell_clip=-1.0,  # none
        ).h
        return tf.transpose(read, (1, 0, 2)) if self.return_sequences else read[-1]


def _cell_before_forget(weights: Any) -> Any:
    """Gates along the last axis in the operation's order: input, cell, forget, output."""
    read, forget, cell, output = tf.split(weights, 4, axis=-1)
    return tf.concat([read, cell, forget, output], axis=-1)
