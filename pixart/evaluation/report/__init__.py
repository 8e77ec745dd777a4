"""What people read: pages, tables and plots."""
