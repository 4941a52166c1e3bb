"""What Keras makes of many small operations, each as one: to train with. Imports TensorFlow."""

from collections.abc import Sequence
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


class FusedAdamW(keras.optimizers.Adam):  # type: ignore[misc]
    """Keras's AdamW, to float32's last digits, from TensorFlow's ``ApplyAdam``.

    Keras needs 50 operations more for each variable, those of the learning rate's schedule among
    them: half of what it takes to build a network's training graph.
    """

    def __init__(self, rate: Any, decay: float, undecayed: Sequence[str], **options: Any) -> None:
        """``rate`` is a number or a schedule, ``undecayed`` the names of variables that keep all.

        Keras's own ``weight_decay`` is not used.
        """
        super().__init__(rate, **options)
        self.decay, self.undecayed = decay, undecayed

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Change the variables (those it was built with, if None) by their gradients."""
        step = tf.cast(self.iterations.value + 1, tf.float32)
        self.powers = tf.pow(self.beta_1, step), tf.pow(self.beta_2, step)
        super().apply(grads, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change one variable: first its decay, then Adam's step, as in Keras."""
        place = self._get_variable_index(variable)
        if self.decay and self._trainable_variables[place].name not in self.undecayed:
            variable.assign(variable * (1 - self.decay * learning_rate))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[place].value.handle,
            v=self._velocities[place].value.handle,
            beta1_power=self.powers[0],
            beta2_power=self.powers[1],
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def _cell_before_forget(weights: Any) -> Any:
    """Gates along the last axis in the operation's order: input, cell, forget, output."""
    read, forget, cell, output = tf.split(weights, 4, axis=-1)
    return tf.concat([read, cell, forget, output], axis=-1)
