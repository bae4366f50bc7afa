"""Q-Hitter (MLSys 2024; https://github.com/VITA-Group/Q-Hitter): heavy hitters, quantised."""

from minikv_jax.methods.h2o import H2O
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method

register_method(
    Method(
        name="q-hitter",
        citation="Q-Hitter, MLSys 2024: heavy hitters + recent window (59 % as in MiniKV's table 1), 4 bits",
        scorer=H2O(),
        heavy=0.295,
        recent=0.295,
        quantizer=MinMax(k_bits=4, v_bits=4, group_size=32),
    )
)
