"""The paid routes under SIGKILL: workers and pollers that die at each step, and a bill that must not notice."""
