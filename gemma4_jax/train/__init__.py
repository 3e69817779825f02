"""Training: loss, optimizer, step and the one visible loop; SFT and QAT are the same loop with another loss."""
