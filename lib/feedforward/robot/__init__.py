"""A robot's policy with experts: simulated tasks, demonstrations, the policy and its rollouts."""
