"""What surrounds a training run: its settings, start, folder, state to resume from, reports and origin."""
