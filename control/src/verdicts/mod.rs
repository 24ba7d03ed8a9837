//! From what vantages see of regions to the plan: who gets how much of the traffic.
