"""Who may call the gateway, and what each key used."""
