import threading

from clapsep.runtime.scratch import Pool


def test_one_piece_serves_calls_that_follow_each_other():
    pool = Pool(object)
    with pool.borrow() as first:
        pass
    with pool.borrow() as second:
        assert second is first


def test_a_piece_comes_back_after_an_error():
    pool, lent = Pool(object), []
    for _ in range(2):
        try:
            with pool.borrow() as piece:
                lent.append(piece)
                raise KeyError
        except KeyError:
            pass
    assert lent[0] is lent[1]


def test_users_at_the_same_time_have_pieces_of_their_own_and_few_are_kept():
    pool, everyone, lent = Pool(object, keep=2), threading.Barrier(5), []

    def work():
        with pool.borrow() as piece:
            lent.append(piece)
            everyone.wait()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, lent))) == 5
    with pool.borrow() as a, pool.borrow() as b, pool.borrow() as c:
        assert sum(any(piece is old for old in lent) for piece in (a, b, c)) == 2
