"""A registered version answers chats: in this process, in MLflow's, or as a server."""
