"""The prefill tier: its servicer and its scheduling policy. Computes prompts and hands their pages off."""
