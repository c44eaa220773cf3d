def write(*a,**k): print(a,k)
