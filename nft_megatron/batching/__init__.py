"""How sequences are laid out for a forward pass, and what their loss is divided by."""
