"""The training loop and what it moves: state, optimizer, schedule, device."""
