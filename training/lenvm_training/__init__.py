"""From prompts to a LenVM head: rollouts, targets, training, checkpoint, evaluation."""
