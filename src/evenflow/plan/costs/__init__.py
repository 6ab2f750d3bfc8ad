"""What a choice costs each device beside its nodes, and what it holds, op by op."""
