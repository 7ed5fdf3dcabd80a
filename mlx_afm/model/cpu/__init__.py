"""What only MLX's CPU backend needs: other forms of operations that it is slow at, chosen by `model.backend`."""
