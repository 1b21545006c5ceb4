"""A server's command line, its key, and its end, with the real vLLM."""

import httpx


def test_two_servers_answer_and_ask_for_the_key(vllm_servers):
    for server in vllm_servers:
        assert httpx.get(f"{server.url}/v1/models", headers=server.headers).json()["data"][0]["id"] == "policy"
        for path in ("/health", "/v1/models", "/weight_info", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
        stranger = {"Authorization": "Bearer x"}
        rpc = httpx.post(f"{server.url}/collective_rpc", json={"method": "reload_weights"}, headers=stranger)
        assert rpc.status_code == 401
