"""What a process says of itself: metrics under names that dashboards know."""
