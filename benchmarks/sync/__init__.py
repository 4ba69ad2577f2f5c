"""Seconds to bring the policy's weights into a rollout engine."""
