"""What is published: cards, splits, and the one commit that carries them."""
