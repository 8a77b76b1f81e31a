"""What every process of ours needs: errors, a clock, children that end with it, compiled functions."""
