"""What is known of a token besides its label."""
