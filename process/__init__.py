"""What every process of ours needs: kinds of errors, a clock, child processes, compiled functions."""
