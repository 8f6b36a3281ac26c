"""One process of the traffic test: 16 channels, each with its own messages of 1 byte to 1 MiB and their answers.

Usage: ``channel_traffic.py SOCKET MESSAGES NUMBER``; MESSAGES is that of all 64 channels of 4 such processes together.
Prints how many answers came, each checked: to its caller, once, in order.
"""

import random
import sys
import threading
from typing import List

from thirstys_waterfall.security.microvm_isolation import CommunicationChannel

CHANNELS = 16
# Questions that a channel has under way.
AHEAD = 4


def text(seed: int) -> str:
    """1 byte to 1 MiB, most of them short, all different."""
    chance = random.Random(seed)
    size = int(2 ** chance.uniform(0, 20))
    return ("{:x}-".format(seed) * (size // 4 + 1))[:size]


def talk(path: str, name: int, count: int, wrong: List[str]) -> None:
    channel = CommunicationChannel("traffic", socket_path=path)
    if not channel.connect(30):
        wrong.append(str(channel.last_error))
        return
    file, asked = "/tmp/{}".format(name), 0
    for number in range(count):
        while asked < min(number + AHEAD, count):
            # What is written by one message is read back by the next.
            write = {"command": "write_file", "params": {"path": file, "data": text(name * 1_000_000 + asked)}}
            read = {"command": "read_file", "params": {"path": file, "max_bytes": 1 << 20}}
            message = dict(write if asked % 2 == 0 else read, type="command", id=[name, asked])
            if not channel.send_message(message):
                wrong.append(str(channel.last_error))
                return
            asked += 1
        answer = channel.receive_message(300)
        if answer is None or answer.get("id") != [name, number] or answer.get("status") != "ok":
            wrong.append("{} {}: {} {}".format(name, number, str(answer)[:200], channel.last_error))
            return
        expected = text(name * 1_000_000 + number - number % 2)
        result = answer["result"]
        if (result["bytes_written"] != len(expected)) if number % 2 == 0 else (result["data"] != expected):
            wrong.append("{} {}: another answer".format(name, number))
    if channel.receive_message(0.2) is not None:
        wrong.append("{}: one answer too many".format(name))
    channel.close()


def main() -> int:
    path, messages, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    wrong: List[str] = []
    count = messages // 64
    names = [number * CHANNELS + index for index in range(CHANNELS)]
    threads = [threading.Thread(target=talk, args=(path, name, count, wrong)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(count * CHANNELS, *wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
